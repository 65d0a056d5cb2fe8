"""Tables, pictures and one HTML page of measurement records, and a check of documents on them."""
