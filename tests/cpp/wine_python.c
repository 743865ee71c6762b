// A Python in a Wine process: loads the library that LIBRARY names, a DLL, and tells by LIBRARY_FUNCTIONS where a function
// is that finds its functions. See wine_kernels.py.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <windows.h>

extern int Py_BytesMain(int count, char** words);

static HMODULE library;
static int n_words;
static char** all_words;

void* find_function(const char* name) { return GetProcAddress(library, name); }

static DWORD WINAPI run_python(void* unused) { return Py_BytesMain(n_words, all_words); }

int main(int count, char** words) {
    library = LoadLibraryA(getenv("LIBRARY"));
    if (!library) {
        fprintf(stderr, "%s cannot be loaded: error %lu of Windows\n", getenv("LIBRARY"), GetLastError());
        return 1;
    }
    char address[32];
    sprintf(address, "%p", (void*)&find_function);
    setenv("LIBRARY_FUNCTIONS", address, 1);
    dlopen(getenv("LIBPYTHON"), RTLD_NOW | RTLD_GLOBAL);  // its names are for the extensions that Python loads
    n_words = count, all_words = words;
    // a thread, since the main one has the small stack of a program for Windows
    const HANDLE thread = CreateThread(NULL, 256 << 20, run_python, NULL, STACK_SIZE_PARAM_IS_A_RESERVATION, NULL);
    DWORD code = 1;
    WaitForSingleObject(thread, INFINITE);
    GetExitCodeThread(thread, &code);
    return (int)code;
}
