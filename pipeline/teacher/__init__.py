"""What a teacher says about an example: one protocol, and the engines that answer it."""
