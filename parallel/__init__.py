"""What every sharded thing stands on: who owns what, who talks to whom, and the account of it."""
