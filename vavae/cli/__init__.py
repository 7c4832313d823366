"""The console command `vavae`, one module per group of commands."""
