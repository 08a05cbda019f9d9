import java.util.Set;
import org.apache.kafka.common.security.oauthbearer.OAuthBearerToken;

/** What a validator has found a token to be. */
record Token(String value, String principalName, Long startTimeMs, long lifetimeMs)
        implements OAuthBearerToken {
    @Override
    public Set<String> scope() {
        return Set.of();
    }
}
