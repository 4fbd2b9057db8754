from effad_core.costs import main

main()
