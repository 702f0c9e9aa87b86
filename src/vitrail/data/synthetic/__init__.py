"""Images that are computed: endless, with perfect labels, and no files."""
