# Part of _hip.pyx: run-time compilation by hiprtc or NVRTC.

def compiler_version():
    cdef int major = 0, minor = 0
    check_compiler(compiler.hiprtcVersion(&major, &minor), "hiprtcVersion")
    return major, minor


cdef bytes c_array(list texts, const char **places):
    for i, text in enumerate(texts):
        places[i] = <bytes>text


def compile_source(bytes source, bytes name, list header_texts, list header_names, list options):
    """(code, log); code is None when the compiler refused the source."""
    cdef const char *texts[32]
    cdef const char *names[32]
    cdef const char *flags[32]
    cdef const char *source_text = source
    cdef const char *source_name = name
    cdef void *program = NULL
    cdef int code, headers = len(header_texts), count = len(options)
    cdef size_t nbytes = 0
    if headers > 32 or count > 32:
        raise ValueError("at most 32 headers and 32 options")
    c_array(header_texts, texts)
    c_array(header_names, names)
    c_array(options, flags)
    with nogil:
        code = compiler.hiprtcCreateProgram(&program, source_text, source_name, headers, texts, names)
    check_compiler(code, "hiprtcCreateProgram")
    try:
        with nogil:
            code = compiler.hiprtcCompileProgram(program, count, flags)
        check_compiler(compiler.hiprtcGetProgramLogSize(program, &nbytes), "hiprtcGetProgramLogSize")
        log = bytearray(nbytes + 1)
        check_compiler(compiler.hiprtcGetProgramLog(program, log), "hiprtcGetProgramLog")
        log_text = bytes(log).rstrip(b"\0").decode(errors="replace")
        if code:
            return None, log_text or (<bytes>compiler.hiprtcGetErrorString(code)).decode()
        check_compiler(compiler.hiprtcGetCodeSize(program, &nbytes), "hiprtcGetCodeSize")
        image = bytearray(nbytes)
        check_compiler(compiler.hiprtcGetCode(program, image), "hiprtcGetCode")
        return bytes(image), log_text
    finally:
        compiler.hiprtcDestroyProgram(&program)


cdef int check_compiler(int code, str call) except -1:
    missing = pending_exception()
    if code == 0 and missing is None:
        return 0
    shown = _cuda_names.get(call, call) if compiler_provider == "cuda" else call
    text = missing or (<bytes>compiler.hiprtcGetErrorString(code)).decode(errors="replace")
    raise DeviceError(f"{shown} failed: {text} ({code})")
