"""What a config costs before anything starts: measured steps, multiplied by how often each method takes them."""
