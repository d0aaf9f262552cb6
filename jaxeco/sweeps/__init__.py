"""What a sweep is made of: its space, its trials in storage, its pictures, the best as a file."""
