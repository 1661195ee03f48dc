"""What drop_syncs.py does: measure schedules, group heads with neurons, and repair weights for a schedule."""
