"""A small trained model and the world it knows: sprites that move over scenes as a prompt says."""
