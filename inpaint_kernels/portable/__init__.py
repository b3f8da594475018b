"""The fast algorithms in plain torch operations: bounded memory, any device."""
