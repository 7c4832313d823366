"""What a person looks at: image grids, training curves and the HTML page that holds them."""
