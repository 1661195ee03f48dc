"""What bench_tp.py is made of."""
