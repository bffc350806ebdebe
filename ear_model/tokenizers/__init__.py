"""What turns images or latents into tokens and back, and images into latents and back."""
