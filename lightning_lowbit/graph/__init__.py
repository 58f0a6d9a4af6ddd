"""What the network looks like: traced forwards, the data flow through them, and the plan of sites."""
