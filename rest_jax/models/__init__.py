"""The policy network and the T5X model contract around it."""
