"""What a policy is worth: sacreBLEU's corpus scores, best-of-N, and whether a difference is more than chance."""
