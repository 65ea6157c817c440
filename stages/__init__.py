"""What a person types: one typer module per stage. Rich lives here and nowhere below."""
