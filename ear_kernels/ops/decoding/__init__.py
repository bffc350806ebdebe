"""The small parts of a decoding step, between the blocks, the score and the next step."""
