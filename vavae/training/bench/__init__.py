"""What a training costs besides its arithmetic, measured."""
