"""Storage: files in a folder or an object store, and the commit records that make jobs idempotent."""
