from clipkd.cli import main

if __name__ == "__main__":
    main()
