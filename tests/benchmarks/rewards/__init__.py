"""What rewards cost, and how exactly they are what they are called."""
