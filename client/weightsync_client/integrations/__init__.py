"""Other trainers' own ways in: each module needs the package that it is named after."""
