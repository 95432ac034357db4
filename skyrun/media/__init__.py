"""Read and write images, video and audio."""
