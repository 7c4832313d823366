"""One training loop, two step objects, and the state that makes a run resumable."""
