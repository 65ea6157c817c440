"""What is trained: first weights, hidden states, adapters, export as a plain HF directory."""
