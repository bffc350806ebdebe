"""What a run reads: images, digits, glyphs, latent caches, and the batches made of them."""
