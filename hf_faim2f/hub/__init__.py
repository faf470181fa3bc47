"""What a published repository says of itself, and how it gets to the Hub."""
