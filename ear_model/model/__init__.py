"""The backbone, its masking, and the files of its weights. Nothing here knows how it is trained or sampled."""
