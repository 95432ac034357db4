"""What files hold and how they are read: headers, tensor names, adapters, and how files are written."""
