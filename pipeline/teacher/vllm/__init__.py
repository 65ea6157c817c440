"""The teacher under vLLM: requests, hooks inside its workers, the self-test of those hooks."""
