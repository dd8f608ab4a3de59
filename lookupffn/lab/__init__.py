"""What we study and show with: may import everything, and nothing imports it."""
