"""Steps timed over layouts, and a cost model that ranks them."""
