"""Token arithmetic: grids, positions, packed rows and their context-parallel slices. No process groups here."""
