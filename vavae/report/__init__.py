"""Reports for people: training curves, pictures, and the HTML pages that hold them."""
