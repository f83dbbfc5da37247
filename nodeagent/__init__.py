"""The node agent: runs the engines of one machine and tells the truth about it."""
