"""Second moments ``sum u u^T`` of the rows of layers, without forming more than is asked."""
