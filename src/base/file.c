/*-------------------------------------------------------------------------
 *
 * file.c
 *		Files that options name: find out why one cannot be used.
 *
 * The functions neither raise errors nor palloc, so that http.c can call them while it
 * finishes a transfer.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"

static void format_user(uid_t id, char *name, size_t size);

/*
 * Describe in a sentence why the server may not read a file: the mode and the owner of the
 * file, or of the directory above it that the server may not search.
 */
void
omni_file_explain_denial(const char *path, char *text, size_t size)
{
	char		denied[MAXPGPATH];
	char		owner[NAMEDATALEN];
	char		server[NAMEDATALEN];
	struct stat st;
	struct group *group;

	text[0] = '\0';
	strlcpy(denied, path, sizeof(denied));
	while (stat(denied, &st) != 0)
	{
		char	   *slash = strrchr(denied, '/');

		if (slash == NULL || slash[1] == '\0')
			return;
		slash[slash == denied ? 1 : 0] = '\0';
	}

	format_user(st.st_uid, owner, sizeof(owner));
	format_user(geteuid(), server, sizeof(server));
	group = getgrgid(st.st_gid);
	snprintf(text, size, "%s \"%s\" has mode %04o and belongs to user \"%s\" and group \"%s\"; the server runs as user \"%s\".",
			 S_ISDIR(st.st_mode) ? "Directory" : "File", denied, (unsigned int) st.st_mode & 07777,
			 owner, group != NULL ? group->gr_name : "unknown", server);
}

/* Write the name of a user, or the number if there is no name, into a buffer. */
static void
format_user(uid_t id, char *name, size_t size)
{
	struct passwd *user = getpwuid(id);

	if (user != NULL)
		strlcpy(name, user->pw_name, size);
	else
		snprintf(name, size, "%u", (unsigned int) id);
}

/*
 * Whether a file can be read and has a certificate in PEM format.  If not, say why in *text.
 */
bool
omni_file_has_certificate(const char *path, char *text, size_t size)
{
	char		line[128];
	int			fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	FILE	   *file = fd >= 0 ? fdopen(fd, "r") : NULL;
	bool		found = false;
	int			error;

	errno = file == NULL ? errno : 0;
	while (file != NULL && !found && fgets(line, sizeof(line), file) != NULL)
		found = strncmp(line, "-----BEGIN ", strlen("-----BEGIN ")) == 0 &&
			strstr(line, "CERTIFICATE-----") != NULL;
	error = errno;
	if (file != NULL)
		fclose(file);

	if (error != 0)
	{
		int			length = snprintf(text, size, "The file cannot be read: %s. ", strerror(error));

		if (error == EACCES)
			omni_file_explain_denial(path, text + length, size - length);
	}
	else if (!found)
		strlcpy(text, "The file holds no certificate in PEM format.", size);
	return found;
}
