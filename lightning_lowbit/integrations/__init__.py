"""Other people's packages that need a hand to run beside the Lightning of today; imported when asked for."""
