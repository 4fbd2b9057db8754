from effad_core.costs import main

if __name__ == "__main__":
    main()
