"""Plans of training steps: costs, placement, schedules. Pure functions and data."""
