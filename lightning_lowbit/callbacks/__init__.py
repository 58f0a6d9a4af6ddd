"""Public faces for a Trainer's callback list; they hold settings and scheduling, no arithmetic."""
