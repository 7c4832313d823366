"""Sources of images: folders, archives and data sets, each as a list of records with random access."""
