"""What a person reads: tables of sites and grids, and what they cost."""
