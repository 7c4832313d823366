"""What a person looks at: training curves, plots, and the HTML page that holds them."""
