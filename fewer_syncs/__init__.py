"""The commands of drop_syncs.py: measure schedules, group heads with neurons, repair weights."""
