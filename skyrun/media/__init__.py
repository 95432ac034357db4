"""Images, video and audio in and out."""
