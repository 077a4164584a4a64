"""What the lecture's files stand on."""
