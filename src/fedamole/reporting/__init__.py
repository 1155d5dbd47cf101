"""Tables from run folders; reads run files only."""
