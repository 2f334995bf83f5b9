"""Do the places of the weights of really trained models follow the row-column picture (2408.08681)?"""
