"""`engine report`: one page of what probes found, from the files that they wrote."""
