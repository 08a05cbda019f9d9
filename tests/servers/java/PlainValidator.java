import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import javax.security.auth.callback.Callback;
import javax.security.auth.callback.NameCallback;
import javax.security.auth.login.AppConfigurationEntry;
import org.apache.kafka.common.security.auth.AuthenticateCallbackHandler;
import org.apache.kafka.common.security.plain.PlainAuthenticateCallback;

/**
 * Lets in who has the password that a file has by now.
 *
 * <p>System property: {@code plain.users}, a file with a line "user password" for each.
 */
public class PlainValidator implements AuthenticateCallbackHandler {
    @Override
    public void configure(
            Map<String, ?> configs, String mechanism, List<AppConfigurationEntry> entries) {}

    @Override
    public void close() {}

    @Override
    public void handle(Callback[] callbacks) throws IOException {
        String user = null;
        for (Callback callback : callbacks) {
            if (callback instanceof NameCallback) {
                user = ((NameCallback) callback).getDefaultName();
            } else if (callback instanceof PlainAuthenticateCallback) {
                PlainAuthenticateCallback asked = (PlainAuthenticateCallback) callback;
                String line = user + " " + new String(asked.password());
                Path users = Path.of(System.getProperty("plain.users"));
                asked.authenticated(Files.readAllLines(users).contains(line));
            }
        }
    }
}
